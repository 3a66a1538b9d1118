"""Where roles run: `local` in this process."""

"""Experiments on one part of a method, without an agent around it: seconds to a minute each."""

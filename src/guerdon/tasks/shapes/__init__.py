"""ShapesWorld: coloured shapes that are drawn, described and judged by rules."""

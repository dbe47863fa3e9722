"""How the exits of a network are used: confidence, thresholds, real early exit, cost, timing, reports."""

"""Figures of a comparison, drawn as SVG panels that a phone can show.

panels       a panel, its SVG, its axes
arms         runs, means and intervals; differences; pairs
lines        learning curves, best of k, time to a target
grid         loss by optimizer;  trials: learning rates;  noise: sources of variance
"""

"""Classification metrics, their bootstrap by group, and the style of figures."""

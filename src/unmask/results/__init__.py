"""How results read: intervals, tables, the figure of accuracy against passes."""

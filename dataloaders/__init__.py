"""From an annotation line to a batch on the CPU; knows no model."""

"""Measuring, and the evidence that measuring leaves behind."""

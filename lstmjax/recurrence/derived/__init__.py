"""The derived engine, for every device: a gradient made for recurrences."""

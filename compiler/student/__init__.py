"""The student that a spec asks for: its widths, what constrains them, its configuration."""

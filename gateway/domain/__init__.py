"""Pure values and rules: money, plans, windows, prices, decisions. No I/O and no clock."""

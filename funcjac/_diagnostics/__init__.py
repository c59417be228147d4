"""Tells what runs and why (``explain``), and checks rows and derivatives closely when asked."""

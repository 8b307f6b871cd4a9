"""What runs where and in which order: settings, Ray session, round, gate, doctor, demo and the `relook` command.

This is the top room: it may import every other, and no other imports it. It holds no model code, no
HTTP handler and no Label Studio call of its own.
"""

"""Rewards in another process: a client, the child that it starts, a server, and when they are asked."""

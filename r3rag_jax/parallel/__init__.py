"""Devices and processes: device mesh, sharding rules, start-up and broadcasts."""

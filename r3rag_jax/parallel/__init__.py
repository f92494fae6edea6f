"""Devices and processes: the mesh, the sharding rules, start-up and broadcasts."""

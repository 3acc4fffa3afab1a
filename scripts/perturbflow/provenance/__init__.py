"""The record of every result: its code, its params and its inputs."""

"""Kills and full disks at every point at which weft changes a file; see CONTRIBUTING.md."""

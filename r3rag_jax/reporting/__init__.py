"""What people look at: rendering, the report page."""

"""The local page: a project's models, data, feedback and runs, and the ordinary commands started by clicks."""

"""Running a kit: its processes kept alive, their output in bounds, started and stopped as one."""

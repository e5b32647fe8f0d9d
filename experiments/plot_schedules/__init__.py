"""What do the schedules of this package look like over a run?"""

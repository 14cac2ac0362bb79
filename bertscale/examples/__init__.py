"""Labelled files, as people have them, -> examples of a task; files of predictions -> figures. No torch."""

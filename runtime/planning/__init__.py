"""What a run needs of memory and disk, judged before anything is loaded."""

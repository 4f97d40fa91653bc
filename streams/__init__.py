"""The shared vocabulary: tasks, video, layout, logs, memory, positions, backbone, scoring, messages.

Invariant: every other package imports this one; it imports none of them, and never Ray.
"""

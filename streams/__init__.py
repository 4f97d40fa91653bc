"""The shared vocabulary: tasks, video, layout, logs, memory, positions, backbone, scoring, messages.

Everything else imports this package; it imports nothing of ours and never imports ray.
"""

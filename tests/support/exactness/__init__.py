"""What it takes to show that engine and learner agree: loud backbones, random streams, planted defects.

`benchmarks.consistency` and the tests use the same ones.
"""

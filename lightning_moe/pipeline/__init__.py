"""Pipeline parallelism: schedules as pure data, and the engine that executes them.

What plans (actions, schedules, validator, simulator, stage division) imports no torch.
"""

"""An artifact as a Triton model repository: configurations, models that run our runtime, scripts, a proof on the real server.

`export` writes it, `replay` proves it, `launcher.serving` starts it.
"""

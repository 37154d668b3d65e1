"""The model.py of each kind of model in a repository. They run inside tritonserver's Python backend, on the runtime that
lies beside them."""

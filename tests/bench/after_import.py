"""Changes a module as soon as it has been loaded, in whatever process imports this: for the files `sitecustomize.py`
beside it, which Python runs at its start where their folder and this one are in PYTHONPATH."""

import importlib.abc
import importlib.util
import sys


class AfterImport(importlib.abc.MetaPathFinder):
    """`change(module)` is called once module `name` has been loaded, before whoever imports it has it."""

    def __init__(self, name, change):
        self.name, self.change = name, change
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def loaded(module):
            load(module)
            self.change(module)

        spec.loader.exec_module = loaded
        return spec

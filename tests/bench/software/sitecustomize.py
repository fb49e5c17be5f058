"""Software multicast in the ranks of a rehearsal on a GPU. In PYTHONPATH, every Python process imports this at its
start; with MNNVL_AR_LIBRARY, a test build, all calls of its workspaces then go as by a multicast, and rows say so.

As tests/common/cases/software.py does it: kernels are given the rank's own block for the address of a multicast.
"""

import importlib.abc
import importlib.util
import sys

NAME = "software multicast"


class Software(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "mnnvl_ar.workspace":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def loaded(module):
            load(module)
            create, begin = module.create, module.Workspace.__init__
            made = []

            def by_software(pointers, rank, *rest, **named):
                made.append(create(pointers, rank, *rest, **{**named, "multicast_pointer": pointers[rank]}))
                return made[-1]

            def __init__(workspace, *arguments, **options):
                begin(workspace, *arguments, **options)
                if workspace.handle in made:
                    workspace.transport = NAME

            module.create, module.Workspace.__init__ = by_software, __init__

        spec.loader.exec_module = loaded
        return spec


sys.meta_path.insert(0, Software())

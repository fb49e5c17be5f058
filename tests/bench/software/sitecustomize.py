"""Software multicast in the ranks of a rehearsal on a GPU. In PYTHONPATH, every Python process imports this at its
start; with MNNVL_AR_LIBRARY, a test build, all calls of its workspaces then go as by a multicast, and rows say so.

As tests/common/cases/software.py does it: kernels are given the rank's own block for the address of a multicast.
"""

from after_import import AfterImport

NAME = "software multicast"


def by_software(module):
    create, begin = module.create, module.Workspace.__init__
    made = []

    def create_by_software(pointers, rank, *rest, **named):
        made.append(create(pointers, rank, *rest, **{**named, "multicast_pointer": pointers[rank]}))
        return made[-1]

    def __init__(workspace, *arguments, **options):
        begin(workspace, *arguments, **options)
        if workspace.handle in made:
            workspace.transport = NAME

    module.create, module.Workspace.__init__ = create_by_software, __init__


AfterImport("mnnvl_ar.workspace", by_software)

"""The floor plan: which module imports which, and how large things may grow.

Every check is a function from a file to a list of what is wrong with it; each is shown a planted
violation as well, which it has to find.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import sharding

ROOT = Path(__file__).parents[1]

# A module imports those right of its arrow and no others, and stands below them: there is no cycle.
# A bare name is a module of the same package.
FLOOR_PLAN = """
sharding.mesh               <-
sharding.tree               <-
sharding.node               <-
sharding.streams            <-
sharding.plain              <-
sharding.place              <-
sharding.comm               <- mesh place plain
sharding.order              <- comm mesh
sharding.tape               <- comm mesh
sharding.rule               <- mesh
sharding.collectives        <- comm mesh node
sharding.gather             <- collectives comm mesh rule
sharding.footprint          <- gather
sharding.leaf               <- mesh rule tree
sharding.arguments          <- gather mesh rule tree
sharding.plan               <- arguments collectives comm footprint gather leaf mesh rule
                               tree
sharding.reshard            <- comm gather plan tree
sharding.inner              <- collectives comm plan
sharding.captured           <-
sharding.closed             <- captured node streams
sharding.fetched            <- comm gather node plain
sharding.walk               <- closed collectives comm fetched gather plan tree
sharding.sharded            <- comm plan walk
sharding.divergence         <- comm mesh
sharding.specification      <- comm
sharding.simulate           <- comm divergence mesh specification streams
sharding.buffers            <-
sharding.distributed.segments <-
sharding.distributed.parcel <- comm distributed.segments divergence
sharding.distributed.link   <- distributed.parcel
sharding.distributed.gloo   <- buffers distributed.link distributed.parcel
sharding.distributed.shared <- distributed.link distributed.parcel distributed.segments
sharding.distributed.meet   <-
sharding.distributed.watch  <- divergence place
sharding.distributed.ranks  <- comm distributed.watch divergence mesh
sharding.distributed.pairwise <- buffers comm distributed.gloo distributed.link distributed.meet
                               distributed.parcel distributed.ranks distributed.segments
                               distributed.shared mesh plain specification
sharding.distributed.overdue <- comm
sharding.distributed.nccl   <- comm distributed.overdue distributed.ranks divergence mesh
sharding.distributed.rendezvous <-
sharding.distributed        <- distributed.nccl distributed.pairwise distributed.ranks
                               distributed.rendezvous mesh
sharding.__init__           <- collectives comm distributed gather inner leaf mesh plan reshard
                               rule sharded simulate
sharding.recording          <- comm mesh simulate
sharding.rehearsal          <- buffers comm mesh specification
sharding.strategies         <- mesh plan rule
sharding.laws               <- comm gather rule simulate strategies
sharding.testing            <- laws recording rule strategies

functional_ep.labels        <- sharding sharding.tree
functional_ep.wide          <-
functional_ep.schedules     <-
functional_ep.factored      <- sharding.node
functional_ep.fused         <- factored
functional_ep.optim         <- fused schedules sharding wide
functional_ep.state         <- optim sharding sharding.tree
functional_ep.step_by_label <- optim state sharding sharding.collectives sharding.tree
functional_ep.sealed        <-
functional_ep.agreement     <- sealed sharding sharding.tree
functional_ep.differentiate <- factored sharding sharding.collectives sharding.comm sharding.node
                               sharding.tree wide
functional_ep.norm          <- differentiate factored sharding sharding.inner sharding.plan
functional_ep.bits          <-
functional_ep.vote          <-
functional_ep.poll          <- bits differentiate norm state vote
                               sharding sharding.mesh sharding.order sharding.tree
functional_ep.train_step    <- agreement differentiate norm optim poll state step_by_label vote
                               sharding sharding.order
functional_ep.evaluate      <- agreement differentiate state sharding sharding.tree
functional_ep.memory        <- differentiate optim state train_step sharding sharding.rehearsal
functional_ep.box           <-
functional_ep.safetensors_file <- box
functional_ep.checkpoint.disk     <-
functional_ep.checkpoint.digest   <- safetensors_file sealed
functional_ep.checkpoint.manifest <- safetensors_file sealed
functional_ep.checkpoint.folder   <- checkpoint.disk checkpoint.manifest sealed
functional_ep.checkpoint.parts    <- checkpoint.manifest safetensors_file state sharding
                                     sharding.gather sharding.tree
functional_ep.checkpoint.payload  <- checkpoint.digest checkpoint.disk checkpoint.folder
                                     checkpoint.manifest checkpoint.parts safetensors_file
                                     sealed
functional_ep.checkpoint.saving     <- agreement checkpoint.digest checkpoint.disk checkpoint.folder
                                     checkpoint.manifest checkpoint.parts checkpoint.payload
                                     state sharding
functional_ep.checkpoint.reader   <- checkpoint.digest checkpoint.disk checkpoint.manifest
                                     safetensors_file sealed sharding.tree
functional_ep.checkpoint.restoring  <- agreement checkpoint.disk checkpoint.folder
                                     checkpoint.manifest checkpoint.reader optim sealed state
                                     sharding sharding.gather sharding.leaf
functional_ep.checkpoint.check    <- checkpoint.disk checkpoint.folder checkpoint.manifest
                                     checkpoint.reader
functional_ep.checkpoint.checkpoints <- agreement checkpoint.check checkpoint.disk
                                     checkpoint.folder checkpoint.parts checkpoint.restoring
                                     checkpoint.saving sealed state sharding
functional_ep.checkpoint.boxed    <- box checkpoint.disk safetensors_file sharding.leaf
functional_ep.checkpoint.dcp      <- agreement box checkpoint.boxed checkpoint.disk
                                     checkpoint.manifest checkpoint.parts optim safetensors_file
                                     state sharding sharding.gather sharding.leaf
functional_ep.checkpoint          <- checkpoint.check checkpoint.checkpoints checkpoint.folder
                                     checkpoint.restoring checkpoint.saving
functional_ep.routing       <- sharding.closed wide
functional_ep.few_shapes    <-
functional_ep.grouped       <- factored few_shapes sharding.closed sharding.node sharding.plain
functional_ep.permute       <- grouped sharding.node
functional_ep.swiglu        <- grouped sharding.closed sharding.node
functional_ep.moe           <- grouped permute routing swiglu
                               sharding.closed sharding.collectives sharding.comm sharding.mesh
functional_ep.attention     <- sharding.plain
functional_ep.cross_entropy <- sharding.closed sharding.node wide
functional_ep.compile       <- sharding.fetched sharding.node sharding.tree
functional_ep.architecture  <- attention compile labels moe routing sharding sharding.mesh
functional_ep.lm            <- architecture cross_entropy differentiate routing
                               sharding sharding.closed sharding.sharded
functional_ep.huggingface.moves   <- box
functional_ep.huggingface.lazy    <- box huggingface.moves
functional_ep.huggingface.source  <- huggingface.lazy huggingface.moves safetensors_file
functional_ep.huggingface.stacks  <-
functional_ep.huggingface.names   <- huggingface.lazy huggingface.stacks
functional_ep.huggingface.convert <- huggingface.lazy huggingface.names huggingface.source
functional_ep.huggingface.load    <- huggingface.convert huggingface.lazy huggingface.names
                                     huggingface.source sharding
functional_ep.huggingface.parts   <-
functional_ep.huggingface.experts <- grouped moe swiglu sharding.closed sharding.comm sharding.mesh
functional_ep.huggingface.adapters <- grouped huggingface.experts huggingface.stacks
functional_ep.huggingface.lora    <- grouped huggingface.experts huggingface.lazy
functional_ep.huggingface.adapted <- huggingface.load huggingface.source sharding
functional_ep.huggingface.detect  <- huggingface.adapters huggingface.experts huggingface.lora
                                     huggingface.stacks
functional_ep.huggingface.files   <- huggingface.lazy huggingface.names huggingface.source
                                     safetensors_file
functional_ep.huggingface.companions <-
functional_ep.huggingface.stream  <- box huggingface.lazy huggingface.names sharding sharding.mesh
functional_ep.huggingface.dump    <- agreement huggingface.companions huggingface.files
                                     huggingface.lazy huggingface.lora huggingface.names
                                     huggingface.source huggingface.stream safetensors_file sharding
functional_ep.huggingface.recording <-
functional_ep.huggingface.skeleton <-
functional_ep.huggingface.idle    <-
functional_ep.huggingface.shift   <-
functional_ep.huggingface.owner <- huggingface.parts
functional_ep.huggingface.replica <- compile huggingface.adapters huggingface.experts
                                     huggingface.owner huggingface.parts huggingface.recording
                                     sharding sharding.captured sharding.mesh sharding.plain
                                     sharding.walk
functional_ep.huggingface.objective <- cross_entropy differentiate routing huggingface.idle
                                     huggingface.replica huggingface.shift sharding wide
functional_ep.huggingface.model   <- huggingface.adapted huggingface.detect
                                     huggingface.experts huggingface.load
                                     huggingface.objective huggingface.replica
                                     huggingface.skeleton huggingface.stacks sharding sharding.walk
functional_ep.huggingface         <- huggingface.dump huggingface.model huggingface.shift
                                     huggingface.stream sharding
functional_ep.recordings.trees <- sharding.tree
functional_ep.recordings.file <- bits recordings.trees safetensors_file sealed
                               sharding sharding.comm sharding.tape
functional_ep.recordings.record <- recordings.file recordings.trees state
                               sharding sharding.streams sharding.tape sharding.tree
functional_ep.recordings.replay <- recordings.file recordings.record recordings.trees state
                               sharding sharding.streams sharding.tape
functional_ep.recordings.compare <- recordings.file recordings.trees
functional_ep.recordings    <-
functional_ep.__init__      <- checkpoint compile evaluate huggingface labels lm optim
                               recordings.compare recordings.record recordings.replay schedules
                               state train_step vote sharding
functional_ep.testing       <- lm optim schedules state train_step vote
                               sharding sharding.testing
functional_ep.corpus        <- safetensors_file
functional_ep.data          <- corpus
functional_ep.metrics       <-
functional_ep.plot          <- metrics
functional_ep.malloc        <-
functional_ep.config        <- lm
functional_ep.vocabulary    <- corpus
functional_ep.program       <- config data huggingface huggingface.idle lm optim schedules state
                               train_step vocabulary sharding
functional_ep.stopping      <- sharding sharding.collectives
functional_ep.progress      <- agreement checkpoint checkpoint.disk checkpoint.folder config corpus
                               program state sharding
functional_ep.job           <- config corpus data huggingface progress vocabulary sharding
functional_ep.train         <- agreement config corpus data evaluate job metrics program progress
                               stopping sharding
functional_ep.report        <- config job metrics plot stopping train sharding
functional_ep.commands      <- checkpoint job malloc metrics program report stopping
                               sharding sharding.distributed
functional_ep.cli           <- commands config program stopping
functional_ep.__main__      <- cli
"""

FILE_LINES = 260
FUNCTION_LINES = 45  # without the docstring
READS_ENVIRONMENT = {
    "sharding.distributed",
    "functional_ep.commands",
    "examples.benchmarks.collectives",
    "examples.benchmarks.peers.launch",
    "examples.benchmarks.train_step",
    "examples.benchmarks.vote",
}
EXCHANGES_FILES = {"functional_ep.checkpoint.boxed", "functional_ep.checkpoint.dcp"}
MUTABLE = {"list", "dict", "set", "bytearray", "defaultdict", "Counter", "deque", "OrderedDict"}


class File(NamedTuple):
    """A module's dotted name and its source."""

    module: str
    source: str

    @property
    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.source))


def files(folder: str) -> list[File]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths, f"{folder} has no files"
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    names = [re.sub(r"(\..*)\.__init__$", r"\1", name) for name in names]  # of inner packages
    return [File(n, path.read_text("utf-8")) for n, path in zip(names, paths, strict=True)]


def parse(floor_plan: str) -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {}
    for row in re.sub(r"\n +", " ", floor_plan).split("\n"):
        module, _, imports = row.partition("<-")
        package = module.split(".")[0]
        arrows[module.strip()] = {
            name if name.startswith("sharding") else f"{package}.{name}" for name in imports.split()
        }
    return {module: names for module, names in arrows.items() if module}


ARROWS = parse(FLOOR_PLAN)
EXPORTED = {f"sharding.{name}" for name in sharding.__all__}


# -- the checks ----------------------------------------------------------------------------------


def imports(file: File) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    package = file.module.split(".")[0]
    for node in file.nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, [package if node.level else "", node.module]))
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                # simulate is a module and the function that it exports; outside it is the function.
                exported = not node.level and inner in EXPORTED
                is_module = inner in ARROWS or inner == "torch.distributed"
                yield inner if is_module and not exported else origin


def arrows(file: File) -> list[str]:
    """Imports inside the repository are those of the floor plan, no more and no fewer."""
    if file.module not in ARROWS:
        return ["is not on the floor plan"]
    allowed = ARROWS[file.module]
    found = {name for name in imports(file) if name.split(".")[0] in ("sharding", "functional_ep")}
    more = [f"imports {name}, to which there is no arrow" for name in sorted(found - allowed)]
    return more + [f"does not import {name}: remove the arrow" for name in sorted(allowed - found)]


def torch_imports(file: File) -> list[str]:
    """Meshes are integers; process groups are the business of one module."""
    wrong: list[str] = []
    names = set(imports(file)) | {
        ast.unparse(n) for n in file.nodes if isinstance(n, ast.Attribute)
    }
    if file.module == "sharding.mesh" and any(re.match(r"torch\b", name) for name in names):
        wrong.append("imports torch")
    if file.module.startswith("sharding.distributed"):
        return wrong
    if file.module in EXCHANGES_FILES:
        names = {n for n in names if not re.match(r"torch\.distributed\.checkpoint\b", n)}
    return wrong + [f"uses {n}" for n in sorted(names) if re.match(r"torch\.distributed\b", n)]


def process_groups(file: File) -> list[str]:
    """functional_ep names mesh axes, never a process group."""
    if not file.module.startswith("functional_ep"):
        return []
    wrong: list[str] = []
    for node in file.nodes:
        if isinstance(node, ast.keyword) and node.arg == "group":
            wrong.append(f"line {node.lineno}: group=")
        fields = ("id", "attr", "arg", "name")
        for name in (getattr(node, field, None) for field in fields):
            if isinstance(name, str) and re.search("process_?group|device_?mesh", name, re.I):
                wrong.append(f"line {getattr(node, 'lineno', '?')}: {name}")
    return wrong


def environment(file: File) -> list[str]:
    """What a run does depends on its arguments; two modules read how it was launched."""
    if file.module in READS_ENVIRONMENT:
        return []
    names = {ast.unparse(node) for node in file.nodes if isinstance(node, ast.Attribute)}
    names |= {
        f"os.{alias.name}"
        for node in file.nodes
        if isinstance(node, ast.ImportFrom) and node.module == "os"
        for alias in node.names
    }
    return [f"reads {name}" for name in sorted(names & {"os.environ", "os.getenv", "os.environb"})]


def sizes(file: File) -> list[str]:
    """Short files, short functions."""
    wrong: list[str] = []
    lines = len(file.source.splitlines())
    if lines > FILE_LINES:
        wrong.append(f"has {lines} lines")
    for node in file.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = _lines(node) - (_lines(node.body[0]) if ast.get_docstring(node) else 0)
            if length > FUNCTION_LINES:
                wrong.append(f"line {node.lineno}: {node.name} has {length} lines")
    return wrong


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def module_state(file: File) -> list[str]:
    """A module holds constants, whose names are in upper case, and nothing that changes."""
    wrong = [f"line {n.lineno}: global" for n in file.nodes if isinstance(n, ast.Global)]
    for node in ast.parse(file.source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and _mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = map(ast.unparse, targets)
            wrong += [
                f"line {node.lineno}: {n}" for n in names if n != "__all__" and not n.isupper()
            ]
    return wrong


def _mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).split(".")[-1] in MUTABLE
    literals = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    return isinstance(value, literals)


def exports(names: Mapping[str, Any]) -> list[str]:
    """A public function or class says in its first line what it is, and shows an example."""
    wrong: list[str] = []
    for name, thing in names.items():
        if isinstance(thing, type) or hasattr(thing, "__code__"):
            doc = thing.__doc__ or ""
            if not doc.split("\n")[0].strip():
                wrong.append(f"{name} has no first line")
            if ">>>" not in doc:
                wrong.append(f"{name} has no example")
    return wrong


# -- applied -------------------------------------------------------------------------------------

LIBRARY = files("sharding") + files("functional_ep")
STRUCTURE = (arrows, torch_imports, process_groups)
TASTE = (environment, sizes, module_state)


@pytest.mark.parametrize("check", STRUCTURE + TASTE, ids=lambda check: check.__name__)
def test_every_file_follows_the_floor_plan(check: Callable[[File], list[str]]) -> None:
    checked = LIBRARY + (files("examples") if check in TASTE else [])
    wrong = [f"{file.module} {found}" for file in checked for found in check(file)]
    assert not wrong, "\n".join(wrong)


def test_the_floor_plan_lists_the_modules_there_are_each_above_those_that_import_it() -> None:
    assert set(ARROWS) - {file.module for file in LIBRARY} == set(), "modules that do not exist"
    above: set[str] = {"sharding"}
    for module, imported in ARROWS.items():
        assert imported <= above, f"{module} imports what stands below it"
        assert not (module.startswith("sharding") and any("functional_ep" in n for n in imported))
        above.add(module)


@pytest.mark.parametrize("package", ["sharding", "functional_ep"])
def test_everything_exported_is_documented(package: str) -> None:
    module = importlib.import_module(package)
    wrong = exports({name: getattr(module, name) for name in module.__all__})
    assert not wrong, "\n".join(wrong)


# -- planted violations --------------------------------------------------------------------------

MANY_LINES = "\n" * FILE_LINES + "x = 1"
LONG_FUNCTION = "def f(x):\n" + "    x += 1\n" * FUNCTION_LINES
PLANTED = [
    (arrows, "sharding.mesh", "from . import comm"),
    (arrows, "sharding.mesh", "from .comm import Comm"),
    (arrows, "sharding.mesh", "def f():\n    import sharding.comm"),
    (arrows, "sharding.mesh", "from sharding import comm"),
    (arrows, "sharding.mesh", "from functional_ep.state import State"),
    (arrows, "sharding.comm", "x = 'an arrow that is not used'"),
    (arrows, "sharding.unheard_of", ""),
    (torch_imports, "sharding.mesh", "from torch import Tensor"),
    (torch_imports, "sharding.comm", "import torch.distributed as dist"),
    (torch_imports, "sharding.comm", "from torch import distributed"),
    (torch_imports, "sharding.comm", "from torch.distributed.device_mesh import init_device_mesh"),
    (torch_imports, "functional_ep.moe", "import torch\nr = torch.distributed.get_rank()"),
    (torch_imports, "functional_ep.checkpoint.dcp", "from torch.distributed import get_rank"),
    (torch_imports, "functional_ep.moe", "import torch.distributed.checkpoint"),
    (process_groups, "functional_ep.moe", "def f(process_group): ..."),
    (process_groups, "functional_ep.moe", "all_reduce(x, group=None)"),
    (process_groups, "functional_ep.moe", "from somewhere import ProcessGroup"),
    (process_groups, "functional_ep.moe", "mesh = comm.device_mesh"),
    (environment, "sharding.comm", "import os\nx = os.environ['RANK']"),
    (environment, "sharding.comm", "import os\nx = os.getenv('RANK')"),
    (environment, "examples.train", "from os import environ"),
    (sizes, "sharding.comm", MANY_LINES),
    (sizes, "sharding.comm", LONG_FUNCTION),
    (sizes, "sharding.comm", "class C:\n" + re.sub("^", "    ", LONG_FUNCTION, flags=re.M)),
    (module_state, "sharding.comm", "cache = {}"),
    (module_state, "sharding.comm", "_cache: dict[int, int] = {}"),
    (module_state, "sharding.comm", "from collections import defaultdict\nx = defaultdict(list)"),
    (module_state, "sharding.comm", "N = 0\ndef f():\n    global N\n    N += 1"),
]


@pytest.mark.parametrize(("check", "module", "source"), PLANTED)
def test_a_planted_violation_is_found(
    check: Callable[[File], list[str]], module: str, source: str
) -> None:
    assert check(File(module, source))


@pytest.mark.parametrize("doc", [None, "\n    >>> 1\n    1", "Says what it is."])
def test_an_export_without_first_line_or_example_is_found(doc: str | None) -> None:
    def function() -> None: ...

    function.__doc__ = doc
    assert exports({"function": function, "Class": type("Class", (), {"__doc__": doc})}) != []


def test_what_is_right_is_let_through() -> None:
    documented = '    """Law.\n\n' + "    line\n" * FUNCTION_LINES + '    """\n    return x\n'
    right = f"__all__ = ['f']\nNAMES = ['ep']\ndef f(x):\n{documented}"
    assert len(right.splitlines()) < FILE_LINES
    for check in (torch_imports, process_groups, *TASTE):
        assert check(File("functional_ep.moe", right)) == []
    assert arrows(File("sharding.rule", "import torch\nfrom .mesh import Axes")) == []

"""What the CPU is, and machine code for it."""

import dataclasses
import functools
from collections.abc import Sequence

import llvmlite.binding as llvm
import llvmlite.ir as ir


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of CPU that code is emitted for.

    Attributes:
        bits: of a vector register.
        rows: of the tile of sums that a product keeps in registers, where it is widest.
        vectors: of columns of that tile.
        cpu: its name, as LLVM knows it.
        features: what it has, likewise.
        triple: the kind of machine, likewise.
    """

    bits: int
    rows: int
    vectors: int
    cpu: str
    features: str
    triple: str

    def lanes(self, dtype: str) -> int:
        """Numbers in a vector.

        Example:
            >>> machine = Machine(256, 6, 2, "haswell", "+avx2,+fma", "x86_64-unknown-linux-gnu")
            >>> machine.lanes("float32"), machine.lanes("float64")
            (8, 4)
        """
        return self.bits // {"float32": 32, "float64": 64}[dtype]

    def tile_rows(self, vectors: int) -> int:
        """Rows of a tile of so many vectors: what is narrower is taller, up to eight.

        Example:
            >>> machine = Machine(256, 4, 3, "haswell", "+avx2,+fma", "x86_64-unknown-linux-gnu")
            >>> [machine.tile_rows(vectors) for vectors in (1, 2, 3)]
            [8, 6, 4]
        """
        return min(8, self.rows * self.vectors // vectors)

    def row_blocks(self, rows: int, vectors: int) -> int:
        """Blocks, none taller than the tile, that so many rows are cut into.

        Example:
            >>> machine = Machine(256, 4, 3, "haswell", "+avx2,+fma", "x86_64-unknown-linux-gnu")
            >>> machine.row_blocks(133, 2)
            23
        """
        return -(-rows // self.tile_rows(vectors))

    @property
    def gradient_vectors(self) -> int:
        """Of the tile of the products that sum over rows of the batch.

        Their left side is packed for it, so 6 x 2 is faster there than 4 x 3, elsewhere slower.
        """
        return 2 if self.vectors == 3 else self.vectors

    @classmethod
    @functools.cache
    def host(cls) -> "Machine":
        """This machine's."""
        _initialize()
        has = llvm.get_host_cpu_features()
        triple = llvm.get_process_triple()
        cpu, features = llvm.get_host_cpu_name(), has.flatten()
        if has.get("avx512f"):  # 32 registers
            return cls(512, 6, 4, cpu, features + ",-prefer-256-bit", triple)
        if has.get("avx2") and has.get("fma"):  # 16: 12 of sums, 3 of weights, 1 of the other side
            return cls(256, 4, 3, cpu, features, triple)
        if triple.startswith(("aarch64", "arm64")):  # 32
            return cls(128, 6, 4, cpu, features, triple)
        return cls(128, 3, 3, cpu, features, triple)

    def target(self) -> llvm.TargetMachine:
        """What emits code for it."""
        _initialize()
        return llvm.Target.from_triple(self.triple).create_target_machine(
            cpu=self.cpu, features=self.features, opt=3, reloc="pic", jit=True
        )


@functools.cache
def _initialize() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def compile_text(text: str, machine: Machine) -> bytes:
    """An object file for a machine, which need not be this one.

    Vectors and loops stay as they were written: what emitted them knows better.
    """
    target = machine.target()
    parsed = llvm.parse_assembly(text, llvm.create_context())
    parsed.triple, parsed.data_layout = machine.triple, str(target.target_data)
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(parsed, passes)
    return target.emit_object(parsed)


def compile_module(module: ir.Module, machine: Machine) -> bytes:
    """The same of a module that has been written here."""
    return compile_text(str(module), machine)


_LOADED: list[object] = []
"""What holds machine code that has been loaded: it stays for the rest of the process."""


def load_object(code: bytes, names: Sequence[str]) -> dict[str, int]:
    """Addresses of the functions of an object file, by name, until the process ends."""
    jit = llvm.create_lljit_compiler(Machine.host().target(), use_jit_link=True)
    library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    for name in names:
        library.export_symbol(name)
    linked = library.link(jit, f"lstmjax{len(_LOADED)}")
    _LOADED.append((jit, linked))
    return {name: linked[name] for name in names}

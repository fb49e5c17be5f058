"""What in Python source for the DSL could be contracted, or rounded otherwise than docs/numerics.md says.

    lint(Path("my_epilogue.py").read_text())       ["12: y * y: an operator computes"]

Contract
  * Every operator that computes is named, `+ - * / // % ** @`, in any expression: of two Float32 the DSL's compiler
    may contract a product and a sum. So it is for files without arithmetic of other kinds, of indices and addresses.
  * Every call of `cutlass.cute.math`, by the names `ieee`, `math` or `cute.math`, is named that does not round once, to
    nearest (`rounding=NEAREST`).
"""

from __future__ import annotations

import ast

_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
_ROUNDED_ONCE = ("add", "sub", "mul", "div", "sqrt")


def lint(source: str) -> list[str]:
    """What is wrong, a line each as "line: what"; empty if nothing is."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, _ARITHMETIC):
            wrong.append(f"{node.lineno}: {ast.unparse(node)}: an operator computes")
        if (
            isinstance(node, ast.UnaryOp)
            and isinstance(node.op, ast.USub)
            and not isinstance(node.operand, ast.Constant)
        ):
            wrong.append(f"{node.lineno}: {ast.unparse(node)}: an operator computes")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, ast.unparse(node.func.value)
            is_math = owner in ("ieee", "math", "cute.math")
            named = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "rounding"]
            if is_math and name not in _ROUNDED_ONCE:
                wrong.append(f"{node.lineno}: {ast.unparse(node)}: not an operation of IEEE 754 with one rounding")
            elif is_math and named != ["NEAREST"]:
                wrong.append(f"{node.lineno}: {ast.unparse(node)}: wanted rounding=NEAREST")
    return wrong

"""`python -m reapkit.evaluation.proofs REQUEST.json PROOFS.json`: runs the proofs in a process of their own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from reapkit.evaluation.proofs.proof import Proof
from reapkit.evaluation.proofs.prove import Request
from reapkit.evaluation.proofs.pruned import prove_pruned
from reapkit.evaluation.proofs.quantized import prove_quantized
from reapkit.quantization.quiet import quiet


def proofs(request: Request) -> list[Proof]:
    """Those of every directory of the request, each naming its directory."""
    found: list[Proof] = []
    common = {"probe": request.probe, "device": request.device, "trust_remote_code": request.trust_remote_code}
    if (pruned := request.directories.get("pruned")) is not None and request.selection is not None:
        found += [
            replace(proof, directory="pruned")
            for proof in prove_pruned(request.source, pruned, request.selection, repaired=request.repaired, **common)
        ]
    if (quantized := request.directories.get("quantized")) is not None:
        found += [
            replace(proof, directory="quantized")
            for proof in prove_quantized(pruned or request.source, quantized, request.quantize, **common)
        ]
    return found


def main() -> None:
    """Reads the request, writes its proofs."""
    question, answer = map(Path, sys.argv[1:3])
    with quiet():
        found = proofs(Request.from_json(json.loads(question.read_text(encoding="utf-8"))))
    answer.write_text(json.dumps([asdict(proof) for proof in found]))


if __name__ == "__main__":
    main()

"""The numeric contract proven for every input, by an SMT solver: docs/proof.md."""

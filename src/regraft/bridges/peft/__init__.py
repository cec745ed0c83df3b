"""PEFT: loading adapters of either layout into live models, and doing so behind PEFT's own functions."""

"""Rule books: equations with names, the kinds of their tensors, and the library."""

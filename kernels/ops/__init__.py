"""The ops: a folder each, with the public function, its definition, and what is faster."""

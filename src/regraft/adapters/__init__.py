"""Adapters: read them into factors, move the factors through a plan, write them as PEFT reads them."""

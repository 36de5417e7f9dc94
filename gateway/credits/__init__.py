"""The credit engine: reservations, settlements and prepaid credits, kept by Lua scripts in the store."""

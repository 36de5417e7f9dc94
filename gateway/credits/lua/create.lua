#!lua
--[[ create: open an account on a plan, in the windows of now, with a balance of 0.

KEYS  1 account hash   2 shard's ledger
ARGV  1 account   2 plan   3 the plan's terms
Returns {'created', funds…} | {'exists', plan} ]]
--#include number window ledger account terms rolling plan

assert(#KEYS == 2 and #ARGV == 3, 'create takes 2 keys and 3 arguments')
local name, plan = ARGV[1], ARGV[2]
local terms = ARGV[3]
read_terms(terms)

-- Check
local account, existing = load_account(KEYS[1], plan, 'plan')
if existing then return {'exists', existing} end

-- Write
change(account, 'plan', plan)
local now = store_ms(0)
add_entry(account, 'open', name, {}, {'plan', plan})
roll(account, terms, now)
remember_time(account, now)
save_account(account, KEYS[2], name, now)
return {'created', funds(account, now)}

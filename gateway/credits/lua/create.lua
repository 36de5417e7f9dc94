#!lua
--[[ create: open an account on a plan, in the window of now, with a balance of 0.

KEYS  1 account hash   2 shard's ledger
ARGV  1 account   2 plan   3 allowance kind   4 allowance amount (nano)   5 refresh (ms)   6 rate (ppm)   7 payg (0/1)
Returns {'created', funds…} | {'exists', plan} ]]
--#include number window account ledger

assert(#KEYS == 2 and #ARGV == 7, 'create takes 2 keys and 7 arguments')
local name, plan = ARGV[1], ARGV[2]
local terms = read_terms(3)

-- Check
local existing = load_account(KEYS[1])
if existing then return {'exists', existing.plan} end

-- Write
local account = new_account(KEYS[1], plan)
local now = store_ms()
roll(account, terms, now)
remember_time(account, now)
append_entry(KEYS[2], name, account, 'open', name, now, {}, {'plan', plan})
append_refresh(KEYS[2], name, account, now)
save_account(account)
return funds(account, terms, now, {'created'})

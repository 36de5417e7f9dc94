#!lua flags=no-writes
--[[ show: an account's credits as they are now, its windows rolled in the answer only.

KEYS  1 account hash
ARGV  1 plan   2 the plan's terms
Returns {'funds', funds…} | {'unknown_account'} | {'other_plan', plan} ]]
--#include number window ledger account terms rolling plan

assert(#KEYS == 1 and #ARGV == 2, 'show takes 1 key and 2 arguments')
local terms = ARGV[2]
read_terms(terms)

local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
if account.plan ~= ARGV[1] then return {'other_plan', account.plan} end
local now = store_ms(account.seen)
roll(account, terms, now)
return {'funds', funds(account, now)}

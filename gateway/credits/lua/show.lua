#!lua flags=no-writes
--[[ show: an account's credits as they are now, its window rolled in the answer only.

KEYS  1 account hash
ARGV  1 plan   2 allowance kind   3 allowance amount (nano)   4 refresh (ms)   5 rate (ppm)   6 payg (0/1)
Returns {'funds', funds…} | {'unknown_account'} | {'other_plan', plan} ]]
--#include number window account

assert(#KEYS == 1 and #ARGV == 6, 'show takes 1 key and 6 arguments')
local terms = read_terms(2)

local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
if account.plan ~= ARGV[1] then return {'other_plan', account.plan} end
local now = account_ms(account)
roll(account, terms, now)
return funds(account, terms, now, {'funds'})

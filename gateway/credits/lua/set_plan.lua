#!lua
--[[ set_plan: move an account to another plan at once.

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 operation id   3 version of the change, or 0 for the next one   4 the gateway's clock (ms)
      5 plan   6 the plan's terms
Returns {'changed', repeated (0/1), funds…}
        {'stale', version}: a change of this version or a newer one was applied before
        {'conflict'}: the operation id was used for something else   {'unknown_account'}
        {'skewed', store's clock (ms)}: a refresh would be due and the clocks differ

What was used in a window stays used, and what is held stays held. A window of a new length counts what was used before
it today, so that no sequence of changes hands out an allowance twice. ]]
--#include number window ledger account terms rolling plan operation

assert(#KEYS == 4 and #ARGV == 6, 'set_plan takes 4 keys and 6 arguments')
local name, id, plan = ARGV[1], ARGV[2], ARGV[5]
local version = whole(ARGV[3], 'version')
local gateway_ms = whole(ARGV[4], 'gateway clock')
local terms = ARGV[6]
read_terms(terms)

-- Read
local account, last_version = load_account(KEYS[1], nil, 'plan_version')
if not account then return {'unknown_account'} end
last_version = (last_version or 0) + 0
local now = store_ms(account.seen)

-- Check
local state = operation_state(KEYS[2], name, id, 'plan', plan .. ',' .. ARGV[3])
if state == 'conflict' then return {'conflict'} end
if state == 'repeated' then return {'changed', 1, funds(account, now)} end
if version == 0 then version = last_version + 1 end
if version <= last_version then return {'stale', last_version} end
if skewed(account, now, gateway_ms) then return {'skewed', store_ms(0)} end

-- Write
roll(account, terms, now)
local postings = {}
regrant(account, terms, now, postings)
account.plan = plan
change(account, 'plan', plan)
change(account, 'plan_version', version)
add_entry(account, 'plan', id, postings, {'plan', plan})
remember_time(account, now)
save_account(account, KEYS[4], name, now)
write_operation(KEYS[2], KEYS[3], name, id, 'plan', plan .. ',' .. ARGV[3], now)
return {'changed', 0, funds(account, now)}

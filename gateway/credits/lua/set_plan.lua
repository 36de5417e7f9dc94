#!lua
--[[ set_plan: move an account to another plan at once.

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 operation id   3 version of the change, or 0 for the next one
      4 plan   5 allowance kind   6 allowance amount (nano)   7 refresh (ms)   8 rate (ppm)   9 payg (0/1)
      10 the gateway's clock (ms)
Returns {'changed', repeated (0/1), funds…}
        {'stale', version}: a change of this version or a newer one was applied before
        {'conflict'}: the operation id was used for something else   {'unknown_account'}
        {'skewed', store's clock (ms)}: a refresh would be due and the clocks differ

What was used in the window stays used, and what is held stays held. A longer refresh cycle counts everything used
today, so that no sequence of changes hands out an allowance twice. ]]
--#include number window account ledger operation

assert(#KEYS == 4 and #ARGV == 10, 'set_plan takes 4 keys and 10 arguments')
local name, id, plan = ARGV[1], ARGV[2], ARGV[4]
local version = whole(ARGV[3], 'version')
local terms = read_terms(5)
local gateway_ms = whole(ARGV[10], 'gateway clock')

-- Read
local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
local now = account_ms(account)

-- Check
local state = operation_state(KEYS[2], name, id, 'plan', plan .. ',' .. ARGV[3])
if state == 'conflict' then return {'conflict'} end
if state == 'repeated' then return funds(account, terms, now, {'changed', '1'}) end
if version == 0 then version = account.plan_version + 1 end
if version <= account.plan_version then return {'stale', digits(account.plan_version)} end

if skewed(account, now, gateway_ms) then return {'skewed', digits(store_ms())} end

-- Write
roll(account, terms, now)
local started = account.window_end - account.refresh
local start, finish, grant = window_at(terms, now)
local carried = start < started and account.used_today or 0
local granted = grant - account.granted - carried
account.used = account.used + carried
account.used_today = account.used_today - carried
account.granted = grant
account.refresh = terms.refresh
account.window_end = finish
account.plan = plan
account.plan_version = version
remember_time(account, now)
add_total(account, 'granted', granted)
append_refresh(KEYS[4], name, account, now)
append_entry(KEYS[4], name, account, 'plan', id, now, {granted = granted}, {'plan', plan})
save_account(account)
write_operation(KEYS[2], KEYS[3], name, id, 'plan', plan .. ',' .. ARGV[3], now)
return funds(account, terms, now, {'changed', '0'})

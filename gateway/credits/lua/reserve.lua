#!lua
--[[ reserve: hold credits for a request before it is forwarded.

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 reservation id   3 amount at list price (nano)   4 amount at the plan's rate (nano)
      5 minimum at list price (nano)   6 lease (ms)   7 the gateway's clock (ms)
      8 plan   9 allowance kind  10 allowance amount (nano)  11 refresh (ms)  12 rate (ppm)  13 payg (0/1)
      14 key id, or empty   15 model
Returns {'reserved', from allowance, from balance, list-price cost covered, funds…}
        {'denied', funds…}: nothing was written
        {'unknown_account'} | {'unknown_key'} | {'other_plan', plan} | {'skewed', store's clock (ms)}
        {'conflict'}: the id was used with other parameters   {'ended', state}: the id's reservation is over

The allowance pays first, at the plan's rate; prepaid credits pay the rest at list price. Between the minimum and
the amount, whatever is free is granted. Example: rate 1, amount 10, minimum 4, allowance free 3, balance free 2:
granted 5, from allowance 3, from balance 2. ]]
--#include number window account ledger reservation

assert(#KEYS == 4 and #ARGV == 15, 'reserve takes 4 keys and 15 arguments')
local name, id = ARGV[1], ARGV[2]
local amount = whole(ARGV[3], 'amount')
local amount_at_rate = whole(ARGV[4], 'amount at rate')
local minimum = whole(ARGV[5], 'minimum')
local lease = whole(ARGV[6], 'lease')
local gateway_ms = whole(ARGV[7], 'gateway clock')
local terms = read_terms(9)
local asked = table.concat({ARGV[3], ARGV[4], ARGV[5]}, ',')

-- Read
local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
local now = account_ms(account)
local repeated = read_record(KEYS[2], id)
if repeated then
  if repeated.account ~= name or (repeated.state == 'open' and repeated.asked ~= asked) then return {'conflict'} end
  if repeated.state ~= 'open' then return {'ended', repeated.state} end
  return funds(account, terms, now,
    {'reserved', digits(repeated.from_allowance), digits(repeated.from_balance), digits(repeated.payg)})
end

-- Check
if ARGV[14] ~= '' and redis.call('HEXISTS', KEYS[1], 'k:' .. ARGV[14]) == 0 then return {'unknown_key'} end
if account.plan ~= ARGV[8] then return {'other_plan', account.plan} end
if skewed(account, now, gateway_ms) then return {'skewed', digits(store_ms())} end
roll(account, terms, now)
local allowance = allowance_free(account)
local balance = terms.payg and balance_free(account) or 0
local from_allowance, from_balance, covered = amount_at_rate, 0, amount
if allowance < amount_at_rate then
  local by_allowance = covered_by(allowance, terms.rate, amount)
  from_allowance = allowance
  from_balance = math.min(balance, amount - by_allowance)
  covered = by_allowance + from_balance
  if covered < minimum then return funds(account, terms, now, {'denied'}) end
end

-- Write
account.held = account.held + from_allowance
account.balance_held = account.balance_held + from_balance
remember_time(account, now)
append_refresh(KEYS[4], name, account, now)
save_account(account)
write_open(KEYS[2], KEYS[3], id, {
  state = 'open', account = name, epoch = account.epoch, from_allowance = from_allowance, from_balance = from_balance,
  payg = covered, rate = terms.rate, payg_allowed = terms.payg, created = now, expires = now + lease, asked = asked,
  key = ARGV[14], model = ARGV[15]
})
return funds(account, terms, now, {'reserved', digits(from_allowance), digits(from_balance), digits(covered)})

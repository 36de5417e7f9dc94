#!lua
--[[ reserve: hold credits for a request before it is forwarded.

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 reservation id   3 what is asked for (below)   4 lease (ms)   5 the gateway's clock (ms)
      6 key id, or empty   7 model   8 hash of the request's body   9 plan   10 the plan's terms (lib/terms.lua)
Asked for, with commas between: amount at list price (nano), amount at the plan's rate (nano), minimum at list price
(nano) while other requests hold credits, minimum while none does, whether the hold will grow (0/1), hash of the
client's idempotency key or nothing. An amount that is the one before it again is left out.
Returns {'reserved', from allowance, from balance, list-price cost covered, funds…}
        {'denied', funds…}: nothing was written
        {'unknown_account'} | {'unknown_key'} | {'other_plan', plan} | {'skewed', store's clock (ms)}
        {'conflict'}: the id was used with other parameters   {'ended', state}: the id's reservation is over
        {'in_progress' | 'answered', reservation id, cost (nano)} | {'other_body'}: the idempotency key was used before

The allowance pays first, at the plan's rate; prepaid credits pay the rest at list price. Between the minimum and
the amount, whatever is free is granted; one that will grow must leave room for those in flight, too. Example: rate 1,
amount 10, minimum 4, allowance free 3, balance free 2: granted 5, from allowance 3, from balance 2. ]]
--#include number window ledger account terms rolling plan reservation idempotency

assert(#KEYS == 4 and #ARGV == 10, 'reserve takes 4 keys and 10 arguments')
local name, id, asked, key, model, plan = ARGV[1], ARGV[2], ARGV[3], ARGV[6], ARGV[7], ARGV[9]
local listed, rated, least, least_alone, grows, key_hash =
  string.match(asked, '^([^,]*),([^,]*),([^,]*),([^,]*),([01]),(%x*)$')
local amount = whole(listed, 'amount')
local amount_at_rate = rated == '' and amount or whole(rated, 'amount at rate')
local minimum = least == '' and amount_at_rate or whole(least, 'minimum')
local minimum_alone = least_alone == '' and minimum or whole(least_alone, 'minimum alone')
local lease = whole(ARGV[4], 'lease')
local gateway_ms = whole(ARGV[5], 'gateway clock')
local terms = read_terms(ARGV[10])

-- Streams beside each other outgrow what they first hold. So much of what is held stays free for them, and no more than
-- so many times what the new one holds: without it, a new one would take what the others are cut for.
local ROOM_SHARE = 8
local ROOM_AMOUNTS = 8

local function answer_again(account, stored, name, asked, now) --#on-demand
  local record = read_record(stored)
  if record.account ~= name or (record.state == 'open' and record.asked ~= asked) then return {'conflict'} end
  if record.state ~= 'open' then return {'ended', record.state} end
  return {'reserved', parts_sum(record.parts), record.from_balance, record.payg, funds(account, now)}
end

-- Read
local account, key_found = load_account(KEYS[1], nil, 'k:' .. key)
if not account then return {'unknown_account'} end
local now = store_ms(account.seen)
local stored = redis.call('HGET', KEYS[2], id)
if stored then return answer_again(account, stored, name, asked, now) end

-- Check
if key ~= '' and not key_found then return {'unknown_key'} end
local earlier = key_hash ~= '' and earlier_request(KEYS[2], name, key_hash, ARGV[8])
if earlier then return earlier end
if account.plan ~= plan then return {'other_plan', account.plan} end
if skewed(account, now, gateway_ms) then return {'skewed', store_ms(0)} end
roll(account, ARGV[10], now)
local allowance = allowance_free(account)
local balance = terms.payg and balance_free(account) or 0
local from_allowance, from_balance, covered = amount_at_rate, 0, amount
if allowance < amount_at_rate then
  local by_allowance = covered_by(allowance, terms.rate, amount)
  from_allowance = allowance
  from_balance = math.min(balance, amount - by_allowance)
  covered = by_allowance + from_balance
end
local in_flight = held_in_flight(account, terms)
local needed = math.min(in_flight > 0 and minimum or minimum_alone, amount)
local room = grows == '1' and math.min(math.floor(in_flight / ROOM_SHARE), ROOM_AMOUNTS * amount) or 0
if covered < needed or allowance - from_allowance + balance - from_balance < room then
  return {'denied', funds(account, now)}
end

-- Write
local record = {
  state = 'open', account = name, parts = {}, from_balance = 0, payg = covered, rate = terms.rate,
  payg_allowed = terms.payg, on_lost = terms.on_lost, created = now, expires = now + lease, asked = asked, key = key,
  model = model, seen_payg = 0, seen_at_rate = 0, written_off = 0, seen_note = ''
}
add_hold(account, record, from_allowance, from_balance)
remember_time(account, now)
save_account(account, KEYS[4], name, now)
write_record(KEYS[2], KEYS[3], id, record)
if key_hash ~= '' then remember_request(KEYS[2], KEYS[3], name, key_hash, ARGV[8], id, now) end
return {'reserved', from_allowance, from_balance, covered, funds(account, now)}

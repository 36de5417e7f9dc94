#!lua
--[[ release: end a reservation without a cost: void (by whoever made it), expire (only if its lease has run out) or
abandon (whoever made it is known to be gone; otherwise like expire).

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 reservation id   3 'void', 'expire' or 'abandon'
Returns {'settled' | 'voided' | 'expired', id, from allowance, from balance, written off, repeated (0/1)}
        {'open', lease's end (ms)}: expire came too early
        {'unknown_account'} | {'unknown_reservation'}

An expired reservation keeps its record, so that a late settlement still lands once; a voided one is over. What an
earlier window's hold leaves lapses. The window is not rolled: nothing here needs it. ]]
--#include number window account ledger reservation

assert(#KEYS == 4 and #ARGV == 3, 'release takes 4 keys and 3 arguments')
local name, id, verb = ARGV[1], ARGV[2], ARGV[3]
local nothing = {from_allowance = 0, from_balance = 0, written_off = 0}

-- Read
local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
local record = read_record(KEYS[2], id)
if not record or record.account ~= name then return {'unknown_reservation'} end
local now = account_ms(account)

-- Check
if record.state == 'expired' then return ended_reply(id, 'expired', nothing, true) end
if record.state ~= 'open' then return ended_reply(id, record.state, record, true) end
if verb == 'expire' and now < record.expires then return {'open', digits(record.expires)} end

-- Write
release_hold(account, record)
if record.epoch ~= account.epoch then
  add_total(account, 'lapsed', record.from_allowance)
  append_entry(KEYS[4], name, account, 'lapse', id, now, {lapsed = record.from_allowance}, {})
end
remember_time(account, now)
save_account(account)
if verb == 'void' then
  write_ended(KEYS[2], KEYS[3], id, 'voided', name, nothing, now)
  return ended_reply(id, 'voided', nothing, false)
end
record.state, record.expires = 'expired', now + RETENTION_MS
write_open(KEYS[2], KEYS[3], id, record)
return ended_reply(id, 'expired', nothing, false)

#!lua
--[[ refund: give back what one request was charged, to where it came from.

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 operation id   3 reservation id   4 note for the ledger
Returns {'refunded', id, from allowance, from balance, written off, repeated (0/1)}: what it had been charged
        {'not_settled', state}: the reservation is still open, or cost nothing
        {'exceeds_spent', most that could be refunded (nano)}: no more comes back than prepaid credits ever paid
        {'conflict'}: the operation id was used for something else
        {'unknown_account'} | {'unknown_reservation'}: also one whose record was forgotten, 24 h after its end

Prepaid credits return to the balance. Allowance returns to its window as long as that lasts; afterwards it has lapsed,
as it would have unused. Refunding the same reservation again, under whichever id, answers what was done. ]]
--#include number window ledger account terms rolling plan reservation charge operation

assert(#KEYS == 4 and #ARGV == 4, 'refund takes 4 keys and 4 arguments')
local name, operation, id = ARGV[1], ARGV[2], ARGV[3]

-- Read
local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
local now = store_ms(account.seen)
local state = operation_state(KEYS[2], name, operation, 'refund_request', id)
local record = stored_record(KEYS[2], id)

-- Check
if state == 'conflict' then return {'conflict'} end
if not record or record.account ~= name then return {'unknown_reservation'} end
if record.state == 'refunded' then return ended_reply(id, 'refunded', record, true) end
if record.state ~= 'settled' and record.state ~= 'expired' then return {'not_settled', record.state} end
local refundable = refundable_balance(KEYS[1])
if record.from_balance > refundable then return {'exceeds_spent', refundable} end

-- Write
local postings = {}
record.rate, record.payg_allowed = PPM, false
uncharge(account, record, postings)
charge(account, record, 0, 0, postings)
add_entry(account, 'refund_request', operation, postings, {'note', ARGV[4]})
remember_time(account, now)
save_account(account, KEYS[4], name, now)
write_ended(KEYS[2], KEYS[3], id, 'refunded', name, record, now)
write_operation(KEYS[2], KEYS[3], name, operation, 'refund_request', id, now)
return ended_reply(id, 'refunded', record, false)

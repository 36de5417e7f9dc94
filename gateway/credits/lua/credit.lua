#!lua
--[[ credit: change an account's prepaid credits by an operator's word: a grant (bought or given), a refund (of what was
charged to them) or a deduction.

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 operation id   3 'grant', 'refund' or 'deduct'   4 amount (nano)   5 note for the ledger
Returns {'credited', repeated (0/1), balance (nano)}
        {'conflict'}: the operation id was used for something else   {'unknown_account'}
        {'too_large', most that could be added (nano)}
        {'exceeds_spent', most that could be refunded (nano)}: no more comes back than prepaid credits ever paid
        {'exceeds_free', most that could be deducted (nano)}: what requests in flight hold cannot be taken away ]]
--#include number window ledger account operation

assert(#KEYS == 4 and #ARGV == 5, 'credit takes 4 keys and 5 arguments')
local name, id, kind = ARGV[1], ARGV[2], ARGV[3]
local amount = whole(ARGV[4], 'amount')
local totals = {grant = 'bought', refund = 'refunded', deduct = 'deducted'}

-- Read
local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
local now = store_ms(account.seen)

-- Check
local state = operation_state(KEYS[2], name, id, kind, ARGV[4])
if state == 'conflict' then return {'conflict'} end
if state == 'repeated' then return {'credited', 1, account.balance} end
if kind == 'deduct' then
  if amount > balance_free(account) then return {'exceeds_free', balance_free(account)} end
elseif account.balance + amount > MAX_NANO then
  return {'too_large', MAX_NANO - account.balance}
end
if kind == 'refund' and amount > refundable_balance(KEYS[1]) then
  return {'exceeds_spent', refundable_balance(KEYS[1])}
end

-- Write
local change = kind == 'deduct' and -amount or amount
account.balance = account.balance + change
add_total(account, totals[kind], amount)
local postings = {}
post(postings, totals[kind], -change)
post(postings, 'balance', change)
add_entry(account, kind, id, postings, {'note', ARGV[5]})
remember_time(account, now)
save_account(account, KEYS[4], name, now)
write_operation(KEYS[2], KEYS[3], name, id, kind, ARGV[4], now)
return {'credited', 0, account.balance}

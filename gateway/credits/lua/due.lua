#!lua
--[[ due: what the reaper has to do in one shard; forgets ended records whose retention is over.

KEYS  1 shard's records   2 shard's due set
ARGV  1 most ids to look at in one call   2 the gateway's clock (ms)
Returns {ids looked at, id, account, id, account, …}: the open reservations whose lease has run out

Nothing is done while the two clocks differ: a store whose clock has jumped must not end every lease. ]]
--#include number window account reservation

assert(#KEYS == 2 and #ARGV == 2, 'due takes 2 keys and 2 arguments')
local limit = whole(ARGV[1], 'limit')
if clocks_differ(whole(ARGV[2], 'gateway clock')) then return {0} end

local ids = redis.call('ZRANGEBYSCORE', KEYS[2], 1, store_ms(0), 'LIMIT', 0, limit)
local reply = {#ids}
for _, id in ipairs(ids) do
  local record = stored_record(KEYS[1], id)
  if record and record.state == 'open' then
    reply[#reply + 1] = id
    reply[#reply + 1] = record.account
  else
    redis.call('HDEL', KEYS[1], id)
    redis.call('ZREM', KEYS[2], id)
  end
end
return reply
